"""The MMEdit benchmark (Cheng et al. 2023): edit each record of E-VQA and E-IC, by every method, and measure it."""
