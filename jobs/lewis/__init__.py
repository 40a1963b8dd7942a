"""Job bodies that only the Lewis game has."""
