"""How a tensor operation is computed fast on this device."""
