"""Job bodies that only progressive solver training has."""
