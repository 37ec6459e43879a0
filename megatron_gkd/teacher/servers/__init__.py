"""An external teacher: the client side of servers (vLLM, ms-swift) that return the K most probable tokens of sequences.

wire.py     requests and answers of vLLM's /v1/completions as records; every answer is checked completely. Pure.
swift.py    the same for /infer/ of `swift deploy`. Pure.
probes.py   checks of a server before any training.
servers.py  one or several servers as one teacher: `TeacherServers.topk`.

No process groups here: teacher/served.py decides which rank sends requests, and distributes the signals.
"""
