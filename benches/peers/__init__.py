"""Programs that others made, as they are and with this package inside, in turns on the same machine."""
