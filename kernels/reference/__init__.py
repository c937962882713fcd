"""Plain torch specifications of the operations, one file each."""
