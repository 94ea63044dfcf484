"""horovodrun whose server listens on 127.0.0.1 only; by itself it listens on every address of the machine."""

import socketserver
import sys

_bind = socketserver.TCPServer.server_bind


def bind_to_loopback(server):
    """Bind a server to its port on 127.0.0.1."""
    server.server_address = '127.0.0.1', server.server_address[1]
    _bind(server)


if __name__ == '__main__':
    from horovod.runner.launch import run_commandline

    socketserver.TCPServer.server_bind = bind_to_loopback
    sys.exit(run_commandline())
