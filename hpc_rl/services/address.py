"""Where a service binds, and the name or address under which other nodes reach it."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = ("localhost", LOOPBACK, "::1")
ALL_ADDRESSES = "0.0.0.0"
WILDCARDS = (ALL_ADDRESSES, "::")
_SIOCGIFADDR = 0x8915
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d{0,5})?")


class UnroutableHost(RuntimeError):
    """This host's name means nothing on the network; the message says which settings help."""


@dataclass(frozen=True)
class Address:
    """Where a server binds, and under which name others reach it."""

    bind: str
    published: str


def choose_address(host: str | None, interface: str | None, in_allocation: bool) -> Address:
    """Where to bind and what to publish.

    Parameters
    ----------
    host
        `services.NAME.host`: bound and published as it is; a wildcard is bound, and the host's name published.
    interface
        `cluster.network_interface`: its IPv4 address is bound and published. On InfiniBand clusters the host's name
        often belongs to another network than the one nodes talk over.
    in_allocation
        Whether clients may run on other hosts. Otherwise the service is reached over the loopback address only.

    Raises
    ------
    UnroutableHost
        When the host's name does not resolve, or there is no such interface.
    """
    if host and host not in WILDCARDS:
        return Address(host, host)
    if interface:
        address = _interface_address(interface)
        return Address(address, address)
    if not in_allocation and not host:
        return Address(LOOPBACK, LOOPBACK)
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        raise UnroutableHost(
            f"the host name {name!r} does not resolve ({error}), so clients on other nodes would not find this "
            "service; set cluster.network_interface (e.g. ib0), or services.NAME.host"
        ) from error
    # The name often resolves to 127.0.1.1 on the host itself (Debian's /etc/hosts): binding that would shut others out.
    return Address(host or ALL_ADDRESSES, name)


def _interface_address(interface: str) -> str:
    """IPv4 address of a network interface (netdevice(7), SIOCGIFADDR)."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UnroutableHost(
                f"cluster.network_interface: {interface!r} has no IPv4 address here ({error}); this host has {known}"
            ) from error
    return socket.inet_ntoa(answer[20:24])


def bind(address: str, port: int, port_range: tuple[int, int] | None = None) -> socket.socket:
    """A listening TCP socket: on `port`, on the first free one of `port_range`, or on any free one (port 0).

    Raises
    ------
    OSError
        When the port, or every port of the range, is taken; the message names them.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    ports = range(port_range[0], port_range[1] + 1) if port_range else (port,)
    for candidate in ports:
        # asyncio sends at once (TCP_NODELAY) only where the protocol is named: else an answer waits 40 ms for an ACK
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, candidate))
            sock.listen(1024)  # binding alone does not reserve a port: with SO_REUSEADDR two sockets may bind it
        except OSError as error:
            sock.close()
            reason = error
        else:
            return sock
    which = f"ports {ports[0]} to {ports[-1]}" if port_range else f"port {port}"
    raise OSError(reason.errno, f"{which} cannot be bound on {address}: {reason.strerror}; try services.NAME.port: 0")


def plain_name(name: str) -> str:
    """A host's name or address as it is compared: small letters, no final dot, no zone, addresses in one form."""
    name = name.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)


def host_of(header: str) -> str | None:
    """The name or address in a `Host` header, without the port; None where it is malformed."""
    parsed = _HOST.fullmatch(header)
    return plain_name(parsed["address"] or parsed["name"]) if parsed else None


def names_of(*known: str) -> frozenset[str]:
    """What requests may call this host: what it calls itself, `localhost`, and what is `known` besides."""
    own = (socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn())
    return frozenset(plain_name(name) for name in (*own, *LOOPBACK_NAMES, *known))
