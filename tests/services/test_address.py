"""Where a service binds, what it publishes, and which port it takes."""

from __future__ import annotations

import asyncio
import socket

import pytest

from hpc_rl.services.address import Address, UnroutableHost, bind, choose_address


def test_where_a_service_binds_and_what_it_publishes() -> None:
    name = socket.gethostname()
    assert choose_address(None, None, in_allocation=False) == Address("127.0.0.1", "127.0.0.1")
    assert choose_address(None, None, in_allocation=True) == Address("0.0.0.0", name)
    assert choose_address("0.0.0.0", None, in_allocation=False) == Address("0.0.0.0", name)
    assert choose_address("10.1.2.3", "lo", in_allocation=True) == Address("10.1.2.3", "10.1.2.3")
    assert choose_address(None, "lo", in_allocation=True) == Address("127.0.0.1", "127.0.0.1")


def test_a_missing_interface_is_named_together_with_those_that_exist() -> None:
    with pytest.raises(UnroutableHost, match=r"'ib7' has no IPv4 address here .* this host has .*lo"):
        choose_address(None, "ib7", in_allocation=True)


def test_the_first_free_port_of_a_range_is_taken() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} cannot be bound on 127.0.0.1: .* services.NAME.port: 0"):
            bind("127.0.0.1", port)
        with bind("127.0.0.1", 0, (port, port + 20)) as second:
            assert port < second.getsockname()[1] <= port + 20
        with pytest.raises(OSError, match=f"ports {port} to {port} cannot be bound"):
            bind("127.0.0.1", 0, (port, port))


def test_what_is_accepted_sends_at_once() -> None:
    """Without TCP_NODELAY the end of an answer waits for the client's ACK of its beginning, some 40 ms."""

    async def nodelay() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        sock = bind("127.0.0.1", 0)
        async with await asyncio.start_server(answer, sock=sock):
            with socket.create_connection(sock.getsockname()):
                return await accepted

    assert asyncio.run(nodelay()) == 1
