"""Sampling engines behind one protocol (protocol.py); vLLM is imported by the adapters alone, when they are used.

requests.py       what is asked of an engine in a step: seeds, lengths, balance over engines          (pure)
state.py          what an engine may be asked in which state                                         (pure)
worker.py         runs inside vLLM's worker: takes buckets of weights, checks them, loads them
engines.py        which engines a configuration asks for, and which rank drives them
guard.py          what an engine in the trainer's process changes globally, and its restoration
colocate.py       an engine in the torchrun ranks
server.py         engines behind HTTP: client.py sends, wire.py words, transfer.py carries weights (group.py: afar)
local_server.py   a server as a child of this process; supervisor.py sees that it does not outlive it
"""
