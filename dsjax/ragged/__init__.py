"""Ragged memory: key/value pages, page tables, sequences and batches, all explicit state on the device."""

from dsjax.ragged.batch import RaggedBatch
from dsjax.ragged.page_table import PageTable
from dsjax.ragged.pages import KVPages
from dsjax.ragged.state import Outputs, Queue, Sampling, Slots, State

__all__ = ["KVPages", "Outputs", "PageTable", "Queue", "RaggedBatch", "Sampling", "Slots", "State"]
