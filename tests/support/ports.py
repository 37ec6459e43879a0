"""Ports for servers that tests start."""

import socket

LOOPBACK = "127.0.0.1"


def reserve_port() -> socket.socket:
    """A socket at a free port of the loopback interface. While it is open nobody else is given that port, and a server
    can listen there all the same, if it sets SO_REUSEADDR as servers do: this one is bound and does not listen.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((LOOPBACK, 0))
    return reserved
