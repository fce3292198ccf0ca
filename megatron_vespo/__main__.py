from megatron_vespo.cli import main

main()
