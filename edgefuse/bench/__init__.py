"""Timing: in turns within a process (`turns`), and by a routine of fresh processes on any device."""
