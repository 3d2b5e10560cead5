"""energymodel: how many joules an LLM workload costs on a GPU with a serving stack."""

__version__ = "0.1.0"
