"""Does a parallel layout train with the numbers of one process? Run on real ranks, compared tensor by tensor."""
