"""How an assignment is carried out on this machine."""
