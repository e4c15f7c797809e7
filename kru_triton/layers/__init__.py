"""The modules: KRU, KRUCell, KRULSTM, their decoding, and minGRU as a baseline."""
