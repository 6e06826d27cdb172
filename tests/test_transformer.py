"""The ragged forward pass called by hand, as someone with a scheduler of their own would."""

import jax
import jax.numpy as jnp
import numpy as np

import dsjax


def test_forward_over_a_hand_made_batch(tiny_params, tiny_config):
    """A prompt in two chunks beside a whole prompt, on scattered pages, with padding: logits are the dense ones."""
    texts = [np.arange(6, 30), np.arange(40, 51)]
    table = jnp.array([[5, 2, 9], [7, 0, 10]], jnp.int32)  # 10 pages: 10 is none
    pages = dsjax.KVPages.zeros(tiny_config, 10, 8, jnp.float32)
    forward = jax.jit(dsjax.forward, donate_argnums=2)

    def batch(parts, kv_lens):
        """`parts`: for each slot a range of its text."""
        tokens = np.concatenate([texts[slot][part] for slot, part in enumerate(parts)])
        positions = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        slot = np.repeat(np.arange(2), [part.stop - part.start for part in parts])
        room = 32 - len(tokens)
        cu_q_lens = np.concatenate([[0], np.cumsum([part.stop - part.start for part in parts])])
        return dsjax.RaggedBatch(
            tokens=jnp.pad(jnp.asarray(tokens, jnp.int32), (0, room)),
            positions=jnp.pad(jnp.asarray(positions, jnp.int32), (0, room)),
            slot_of_token=jnp.pad(jnp.asarray(slot, jnp.int32), (0, room), constant_values=2),
            cu_q_lens=jnp.asarray(cu_q_lens, jnp.int32),
            kv_lens=jnp.asarray(kv_lens, jnp.int32),
            page_table=table,
            logit_rows=jnp.arange(32),
        )

    dense = dsjax.logits(tiny_params, [text.tolist() for text in texts])
    logits, pages = forward(tiny_params, batch([slice(0, 15), slice(0, 11)], [15, 11]), pages)
    np.testing.assert_allclose(logits[:15], dense[0, :15], atol=1e-4)
    np.testing.assert_allclose(logits[15:26], dense[1, :11], atol=1e-4)
    logits, pages = forward(tiny_params, batch([slice(15, 24), slice(11, 11)], [24, 0]), pages)
    np.testing.assert_allclose(logits[:9], dense[0, 15:24], atol=1e-4)

    written_pages = np.flatnonzero(np.asarray(pages.keys[0]).any(axis=(1, 2, 3)))
    assert written_pages.tolist() == [0, 2, 5, 7, 9], "no page is touched that no slot names"
