"""Services: how a server is found, how it serves many clients at once, and how a client survives its servers."""
