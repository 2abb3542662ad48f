"""Helpers of every room: files, locks, checksums, log, ranks, versions, locations."""
