"""Sampling engines behind one protocol (protocol.py); vLLM is imported by the adapters alone, when they are used.

requests.py       what is asked of an engine in a step: seeds, lengths, balance over engines          (pure)
state.py          what an engine may be asked in which state                                         (pure)
engines.py        which engines a configuration asks for, and which rank drives them
client.py         requests to a server; wire.py their wording, gate.py who may send which
weight_transfer.py  weights to a server, through files or a group of their own (weight_group.py)
vllm/             the adapters: engines in the trainer's ranks, in a child process, behind HTTP; vLLM's side of them
"""
