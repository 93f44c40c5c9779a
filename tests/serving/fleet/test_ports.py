"""Reserved ports and claimed addresses, with real sockets."""

import socket

import pytest

from serving.errors import ConfigError
from serving.fleet.ports import FIRST_PORT, LAST_PORT, AddressClaim, PortReservation, check_free


def test_reserved_port_is_for_servers_with_reuseaddr_only():
    """Whoever looks for a free port finds it taken; our server can still listen on it, twice over."""
    with PortReservation() as reservation:
        assert FIRST_PORT <= reservation.port <= LAST_PORT
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", reservation.port))
        for _ in range(2):
            with (
                socket.create_server(("127.0.0.1", reservation.port)) as server,
                socket.create_connection(server.getsockname()),
            ):
                server.accept()[0].close()


def test_reservations_never_share_a_port():
    """The same port cannot be reserved twice."""
    with PortReservation() as first, pytest.raises(ConfigError, match="is in use"):
        PortReservation(first.port)


def test_listening_port_is_not_free():
    """A port that something listens on is refused in one line that says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} is in use: end what listens"):
            check_free("127.0.0.1", port)


def test_address_of_another_machine_is_refused():
    """An address that no interface of this machine has is a clear line too."""
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:8000 cannot be used"):
        check_free("192.0.2.1", 8000)


def test_claimed_address_keeps_a_second_platform_off_before_anyone_listens():
    """Two platforms that start at once do not get the same port; a released claim is free again."""
    with PortReservation() as free:
        port = free.port
    claim = AddressClaim("127.0.0.1", port)
    with pytest.raises(ConfigError, match="another headrace that is starting"):
        AddressClaim("127.0.0.1", port)
    claim.release()
    AddressClaim("127.0.0.1", port).release()
