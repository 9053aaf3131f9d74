//! One step of the model over a batch of sequence pieces.
//!
//! A batch is a list of items: tokens of one sequence each, a whole prompt, a
//! piece of one, or a single new token. All rows go through the matrices
//! together; attention alone looks at which item a row belongs to.

use crate::{
    BLOCK, KvCache, Model, ModelError, Order, cache,
    ffn::{self, Buffers, ROWS},
    load::Layer,
};
use ashlar_kernels::{add, attention, matmul, rope_halves, rope_interleaved, softcap};

/// Which rows of an item get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// None: a piece of a prompt that goes on.
    None,
    /// The last token's.
    Last,
    /// Every token's.
    All,
}

/// Tokens of one sequence to run.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// The tokens, at positions `start`, `start + 1`, …
    pub tokens: &'a [u32],
    /// Tokens of this sequence already in the cache.
    pub start: usize,
    /// The sequence's page table: block i holds positions `i * BLOCK` onwards.
    pub blocks: &'a [u32],
    /// Which logits to compute.
    pub want: Want,
}

/// Buffers of a step, kept from one to the next.
#[derive(Debug, Default)]
pub struct Workspace {
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    back: Vec<f32>,
    ffn: Buffers,
    logits: Vec<f32>,
    /// (item, position) of each row.
    rows: Vec<(usize, usize)>,
    wanted: Vec<usize>,
    written: Vec<u32>,
}

/// Logits of the wanted rows, in item order.
#[derive(Debug)]
pub struct Logits<'a> {
    vocab: usize,
    data: &'a [f32],
}

impl Logits<'_> {
    /// The logits of wanted row `i`, one a token of the vocabulary.
    ///
    /// # Panics
    /// When `i` is not below [`Logits::rows`].
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.vocab..][..self.vocab]
    }

    /// Wanted rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.vocab
    }
}

impl Model {
    /// Runs the items, writes their keys and values into their blocks and
    /// computes the wanted logits. Nothing is written when it fails.
    ///
    /// # Errors
    /// A token outside the vocabulary, a sequence beyond the context, a page
    /// table too short or with a block outside the cache, a block that two
    /// places would write, a cache of another model.
    pub fn forward<'w>(
        &self,
        items: &[Item],
        cache: &mut KvCache,
        ws: &'w mut Workspace,
    ) -> Result<Logits<'w>, ModelError> {
        self.check(items, cache, ws)?;
        let c = &self.config;
        let Workspace { x, rows, wanted, .. } = ws;
        rows.clear();
        wanted.clear();
        for (i, item) in items.iter().enumerate() {
            let first = rows.len();
            rows.extend((0..item.tokens.len()).map(|t| (i, item.start + t)));
            match item.want {
                Want::All => wanted.extend(first..rows.len()),
                Want::Last if rows.len() > first => wanted.push(rows.len() - 1),
                _ => {}
            }
        }
        x.resize(rows.len() * c.hidden, 0.0);
        let tokens = items.iter().flat_map(|i| i.tokens);
        for (x, token) in x.chunks_exact_mut(c.hidden).zip(tokens) {
            self.embed.dequantize_row(*token as usize, x);
        }
        if c.embedding_scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= c.embedding_scale);
        }
        if let Some(norm) = &self.embed_norm {
            ffn::norm(&self.pool, x, norm, c.eps, &mut ws.normed);
            std::mem::swap(&mut ws.x, &mut ws.normed);
        }
        for (i, layer) in self.layers.iter().enumerate() {
            self.layer(layer, i, items, cache, ws);
        }
        let Workspace { x, normed, mixed, logits, wanted, .. } = ws;
        mixed.clear();
        wanted.iter().for_each(|&r| mixed.extend(&x[r * c.hidden..][..c.hidden]));
        ffn::norm(&self.pool, mixed, &self.norm, c.eps, normed);
        logits.resize(wanted.len() * c.vocab, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embed);
        matmul(&self.pool, normed, wanted.len(), head, logits);
        if let Some(cap) = c.logit_softcap {
            self.pool.chunks_mut(logits, c.vocab, |_, row| softcap(row, cap));
        }
        Ok(Logits { vocab: c.vocab, data: logits })
    }

    fn check(&self, items: &[Item], cache: &KvCache, ws: &mut Workspace) -> Result<(), ModelError> {
        let c = &self.config;
        let want = cache::layout(c, cache.layout.dtype);
        if cache.layers.len() != c.layers || want != cache.layout {
            return Err(ModelError::Cache);
        }
        ws.written.clear();
        for (item, i) in items.iter().enumerate() {
            let len = i.start.saturating_add(i.tokens.len());
            if len > c.context {
                return Err(ModelError::Context { item, len, context: c.context });
            }
            if let Some(&token) = i.tokens.iter().find(|&&t| t as usize >= c.vocab) {
                return Err(ModelError::Token { item, token, vocab: c.vocab });
            }
            let (need, got) = (len.div_ceil(BLOCK), i.blocks.len());
            if got < need {
                return Err(ModelError::Pages { item, len, need, got });
            }
            let used = &i.blocks[..need];
            if let Some(&block) = used.iter().find(|&&b| b as usize >= cache.blocks) {
                return Err(ModelError::Page { item, block, blocks: cache.blocks });
            }
            if !i.tokens.is_empty() {
                ws.written.extend(&used[i.start / BLOCK..]);
            }
        }
        ws.written.sort_unstable();
        match ws.written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ModelError::Shared { block: pair[0] }),
            None => Ok(()),
        }
    }

    fn layer(&self, w: &Layer, index: usize, items: &[Item], cache: &mut KvCache, ws: &mut Workspace) {
        let (c, pool) = (&self.config, &self.pool);
        let Workspace { x, normed, q, k, v, mixed, back, ffn: buffers, rows, .. } = ws;
        let m = rows.len();
        let kv = c.kv_heads * c.head_dim;

        let input = match &w.attn_norm {
            None => &*x,
            Some(norm) => {
                ffn::norm(pool, x, norm, c.eps, normed);
                &*normed
            }
        };
        ffn::linears(pool, input, m, &mut [(&w.q, q), (&w.k, k), (&w.v, v)]);
        if let Some(norms) = &w.qk_norm {
            for (heads, norm) in [&mut *q, &mut *k].into_iter().zip(norms) {
                ffn::norm(pool, heads, norm, c.eps, back);
                std::mem::swap(heads, back);
            }
        }
        self.turn(index, rows, q, c.heads * c.head_dim);
        self.turn(index, rows, k, kv);
        let layer = &mut cache.layers[index];
        layer.store(pool, k, v, |i| {
            let (item, at) = rows[i];
            (items[item].blocks[at / BLOCK], at % BLOCK)
        });
        let seen = |i: usize| {
            let (item, at) = rows[i];
            (items[item].blocks, at + 1)
        };
        mixed.resize(q.len(), 0.0);
        attention(pool, &w.attention, q, layer, seen, mixed);
        ffn::linears(pool, mixed, m, &mut [(&w.o, back)]);
        if let Some(norm) = &w.attn_post_norm {
            ffn::norm(pool, back, norm, c.eps, normed);
            std::mem::swap(back, normed);
        }

        // Side by side, the feed-forward layer reads what attention read.
        let parallel = c.order == Order::Parallel;
        if !parallel {
            add(x, back);
        }
        let input = match &w.ffn_norm {
            None => &*x,
            Some(norm) => {
                ffn::norm(pool, x, norm, c.eps, normed);
                &*normed
            }
        };
        ffn::ffn(pool, &w.ffn, c.activation, input, m, buffers, mixed);
        if parallel {
            add(x, back);
        }
        if let Some(norm) = &w.ffn_post_norm {
            ffn::norm(pool, mixed, norm, c.eps, back);
            std::mem::swap(mixed, back);
        }
        add(x, mixed);
    }

    /// Turns rows of heads, `width` values each, by their positions.
    fn turn(&self, layer: usize, rows: &[(usize, usize)], heads: &mut [f32], width: usize) {
        let c = &self.config;
        let Some(rope) = c.rope_of(layer) else { return };
        let local = self.local_rope.as_ref().filter(|_| c.windows[layer].is_some());
        let Some(table) = local.or(self.rope.as_ref()) else { return };
        let turn = if rope.interleaved { rope_interleaved } else { rope_halves };
        self.pool.chunks_mut(heads, ROWS * width, |chunk, heads| {
            for (i, row) in heads.chunks_exact_mut(width).enumerate() {
                turn(row, c.head_dim, rows[chunk * ROWS + i].1, table);
            }
        });
    }
}
