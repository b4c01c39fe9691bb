"""Reads rows from JSON, CSV, Parquet and Arrow files, which may be on disks, in object stores or on the hub."""
