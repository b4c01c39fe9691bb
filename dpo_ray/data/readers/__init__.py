"""Readers of rows from files of any kind and location: JSON, CSV, Parquet and Arrow, on disks, object stores, the hub."""
