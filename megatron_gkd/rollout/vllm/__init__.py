"""The one place that imports vLLM.

colocate.py       an engine in the torchrun ranks; guard.py: what it changes globally there, and its restoration
server.py         engines behind HTTP
local_server.py   a server as a child of this process; supervisor.py sees that it does not outlive it
worker.py         runs inside vLLM's worker: takes buckets of weights, checks them, loads them
"""
