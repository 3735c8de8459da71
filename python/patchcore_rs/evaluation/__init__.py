"""Test sets inspected and judged, and the tables of that."""
