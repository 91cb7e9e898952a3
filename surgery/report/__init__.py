"""Reports: the ledger as a table and as JSON."""
