"""Faces of other programs' interfaces over this package, a module a program, and the reader of their files."""
