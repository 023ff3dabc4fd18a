"""The loop of streaming VQ under load: what it counts as late."""

from __future__ import annotations

from loadtest.streaming_vq import Seen


def test_an_item_that_is_assigned_before_its_acknowledgement_is_not_late():
    seen = Seen()
    seen.note([7, 8], 1.0)
    seen.acknowledged[7] = 1.01
    seen.note([7], 44.0)  # again, by the candidate stream
    assert seen.assigned[7] == 1.0


def test_a_kill_holds_up_what_was_not_assigned_then_and_what_came_until_nothing_waited():
    seen = Seen(kills=[10.0], back=[5.0], caught_up=[8.0])
    seen.acknowledged = {1: 9.0, 2: 9.9, 3: 12.0, 4: 17.0, 5: 19.0, 6: 11.0}
    seen.assigned = {1: 9.1, 2: 16.0, 3: 16.0, 4: 17.5, 5: 19.1}
    assert seen.held_up() == {2, 3, 4, 6}
