"""Shared helpers: settings, command lines, errors, files, processes and devices."""
