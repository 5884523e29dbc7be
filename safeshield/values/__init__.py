"""Values learned from a log: backups, expectiles, safety critics and reward critics."""
