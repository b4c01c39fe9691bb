"""Read rows from files of any kind and place: JSON, CSV, Parquet and Arrow, on disks, object stores and the hub."""
