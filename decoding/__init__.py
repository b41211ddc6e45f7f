"""The decode round: requests, batching, drafting, scheduling, verification, detokenisation."""
