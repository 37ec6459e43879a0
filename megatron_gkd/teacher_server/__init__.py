"""An external teacher: the client's side of vLLM servers that tell the K most probable tokens of given sequences.

wire.py     requests and answers of /v1/completions as records; every answer is checked completely. Pure.
probes.py   what is found out about a server before any training.
servers.py  one or several servers as one teacher: `TeacherServers.topk`.

No process groups here: train/server_teacher.py says which rank asks, and takes the signals to the others.
"""
