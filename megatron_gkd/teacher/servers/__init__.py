"""An external teacher: the client's side of servers (vLLM, ms-swift) that tell the K most probable tokens of sequences.

wire.py     requests and answers of vLLM's /v1/completions as records; every answer is checked completely. Pure.
swift.py    the same for /infer/ of `swift deploy`. Pure.
probes.py   what is found out about a server before any training.
servers.py  one or several servers as one teacher: `TeacherServers.topk`.

No process groups here: teacher/served.py says which rank asks, and takes the signals to the others.
"""
