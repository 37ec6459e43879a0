"""Sampling engines behind one protocol (protocol.py); vLLM is imported by the adapters alone, when they are used.

requests.py   what is asked of an engine in a step: seeds, lengths, balance over engines          (pure)
worker.py     runs inside vLLM's worker: takes buckets of weights, checks them, loads them
guard.py      what an engine in the trainer's process changes globally, and its restoration
colocate.py   an engine in the torchrun ranks
server.py     engines behind HTTP; transfer.py carries the weights there
"""
