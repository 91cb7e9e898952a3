"""Watchers: what stands beside the line of steps and checks, records and saves."""

from surgery.watchers.accuracy import Accuracy
from surgery.watchers.ledger import Ledger
from surgery.watchers.snapshots import Snapshots
from surgery.watchers.validity import Validity

__all__ = ["Accuracy", "Ledger", "Snapshots", "Validity"]
