"""Runs of image generators: their folders, sessions, steering and reports."""
