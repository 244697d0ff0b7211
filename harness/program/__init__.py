"""Runs that a program of the user trains: its supervisor, and what it reads of the program."""
