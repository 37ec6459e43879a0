"""The only place that imports vLLM.

colocate.py       an engine in the torchrun ranks; guard.py saves and restores the global state that it changes
server.py         engines behind HTTP
local_server.py   a server as a child process; supervisor.py ends it with its parent
worker.py         runs inside vLLM's worker: receives buckets of weights, verifies them, loads them
"""
