"""What PyInstaller is told when it freezes a program that uses this package."""
