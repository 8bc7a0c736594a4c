"""The ops: public functions that check and choose, over `torch.library` ops with schemas, fakes and autograd."""
