"""At whatever moment an asynchronous run is saved, each prompt is in the buffer, used, left out, or drawn again: one of
these."""

import asyncio

import pytest
from small_session import GROUP_SIZE, Counting, Engine, session_of

from megatron_vespo.orchestration.drawn_prompts import DrawnPrompts
from megatron_vespo.orchestration.generator import Generator
from megatron_vespo.orchestration.session import Progress


def drawn_again(progress: Progress, below: int) -> set[str]:
    """The prompts that a run which goes on from here samples, as far as the run before had drawn."""
    stream = DrawnPrompts(Counting(progress.prompts["position"]), progress.drawn)  # type: ignore[index,arg-type]
    return {identity for identity in (stream.take(n).identity for n in range(below)) if int(identity) < below}


@pytest.mark.parametrize("without_variance", ["keep", "filter"])
def test_at_every_turn_of_the_event_loop(without_variance):
    async def main():
        asynchronous = {"sync_every": 2, "max_staleness": 5}
        advantage = {"zero_variance_groups": without_variance}
        session = session_of(Engine(), asynchronous=asynchronous, advantage=advantage)
        generator, used, moments = Generator(session), set(), 0
        generator.start()
        while generator.ledger.step < 3:
            generator.note_progress()
            complete = {group[0].prompt.identity for group in session.progress.mini_batches}
            again = drawn_again(session.progress, session.prompts.position)
            assert not again & (complete | used)
            left_out = set(map(str, range(session.prompts.position))) - again - complete - used
            assert len(left_out) * GROUP_SIZE == session.tally.trajectories_filtered
            assert all(without_variance == "filter" and int(identity) % 3 == 0 for identity in left_out)
            moments += 1
            if generator.ledger.choose(generator.complete) is not None:
                used |= {group.prompt.identity for group in await generator.next_step()}
            await asyncio.sleep(0)
        await generator.stop()
        assert moments > 10

    asyncio.run(main())
