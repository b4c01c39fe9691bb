"""Readers of rows from files of any kind and location: JSON, CSV, Parquet, Arrow; on disks, object stores, the hub."""
