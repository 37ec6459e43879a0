"""Sampling engines behind one protocol (protocol.py). Only the adapters import vLLM, when they are used.

requests.py       requests of a step: seeds, lengths, balance over engines                           (pure)
state.py          which calls an engine accepts in which state                                       (pure)
engines.py        the engines of a configuration, and the ranks that drive them
client.py         requests to a server; wire.py their form, gate.py which of them need the secret
weight_transfer.py  weights to a server, through files or a process group (weight_group.py)
vllm/             the adapters: engines in the trainer's ranks, in a child process, behind HTTP; vLLM's side of them
"""
