"""Patterns as loops in float64, written from their specifications with the parameters of the sources.

Each pattern returns the kept key blocks of one head as a list of sets, one for each query block. `size` is the number
of tokens in a block. The queries are the last positions of the keys. Nothing here imports the library.
"""

import math

LAST_QUERIES = 64


def rows(q_len, kv_len, size):
    """Return the indices of the query blocks on the key grid."""
    return range((kv_len - q_len) // size, math.ceil(kv_len / size))


def by_rule(q_len, kv_len, size, keep):
    """Return the blocks of a fixed pattern, in which row i keeps block j if keep(i, j)."""
    return [{j for j in range(i + 1) if keep(i, j)} for i in rows(q_len, kv_len, size)]


def descending(values):
    """Return the indices from the largest value to the smallest; ties go to the lower index."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))


def last_rows(p, count):
    """Return {position: probabilities} of the last `count` queries; p is [Nq, Nkv]."""
    q_len, kv_len = p.shape
    return {kv_len - q_len + r: p[r].tolist() for r in range(max(0, q_len - count), q_len)}


def line_sums(probabilities, kv_len):
    """Sum the rows for each key, and for each offset (position minus key)."""
    vertical, slash = [0.0] * kv_len, [0.0] * kv_len
    for position, row in probabilities.items():
        for key in range(position + 1):
            vertical[key] += row[key]
            slash[position - key] += row[key]
    return vertical, slash


def vertical_slash(p, size, verticals, slashes):
    """Return the blocks of MInference's vertical-slash; p is the dense probability matrix of one head, [Nq, Nkv]."""
    q_len, kv_len = p.shape
    vertical, slash = line_sums(last_rows(p, LAST_QUERIES), kv_len)
    vertical[:30] = [math.inf] * len(vertical[:30])
    slash[:100] = [math.inf] * len(slash[:100])
    keys = set(descending(vertical)[: max(30, verticals)])
    offsets = set(descending(slash)[: max(50, slashes)])

    def keep(i, j):
        if keys & set(range(j * size, (j + 1) * size)):
            return True
        return any((i * size + a) - (j * size + b) in offsets for a in range(size) for b in range(size))

    return by_rule(q_len, kv_len, size, keep)


def mean_rows(x, start, stop):
    """Return the mean of the rows start..stop - 1 of a list of vectors."""
    chosen = x[start:stop]
    return [sum(column) / len(chosen) for column in zip(*chosen, strict=True)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def divergence(a, b):
    """Return the Jensen-Shannon divergence, natural logarithm."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        middle = (x + y) / 2
        total += (x * math.log(x / middle) if x else 0) / 2 + (y * math.log(y / middle) if y else 0) / 2
    return total


def query_means(q, kv_len, size):
    """Return the mean of the queries of each query block; q is a list of vectors."""
    offset = kv_len - len(q)
    return [
        mean_rows(q, max(0, i * size - offset), (i + 1) * size - offset) for i in rows(len(q), kv_len, size)
    ]  # fmt: skip


def flexprefill(q, k, p, size, gamma, tau, min_budget):
    """Return the blocks of FlexPrefill and if the head is query-aware; q, k are lists of vectors, p is [Nq, Nkv]."""
    q_len, kv_len = p.shape
    if kv_len <= max(2 * size, min_budget):
        return by_rule(q_len, kv_len, size, lambda i, j: True), None
    blocks = math.ceil(kv_len / size)
    least = math.ceil(min_budget / size)
    scale = len(q[0]) ** -0.5
    estimated = last_rows(p, size)
    vertical, slash = ([x / len(estimated) for x in sums] for sums in line_sums(estimated, kv_len))
    pooled = [[sum(x[j * size : (j + 1) * size]) for j in range(blocks)] for x in (vertical, slash)]
    key_means = [mean_rows(k, j * size, (j + 1) * size) for j in range(blocks)]
    last = mean_rows(q, max(0, q_len - size), q_len)
    query_aware = math.sqrt(divergence(softmax([dot(last, key) * scale for key in key_means]), pooled[0])) < tau
    kept = []
    for line, pool in zip((vertical, slash), pooled, strict=True):
        mass, tokens = 0.0, 0
        for value in sorted(line, reverse=True):
            mass, tokens = mass + value, tokens + 1
            if mass > gamma:
                break
        count = least if query_aware else max(least, tokens // size + 1)
        kept.append(set(descending(pool)[:count]))
    grid = rows(q_len, kv_len, size)
    pairs = {}
    for i, query in zip(grid, query_means(q, kv_len, size), strict=True):
        shares = softmax([dot(query, key) * scale for key in key_means[: i + 1]])
        pairs |= {(i, j): share for j, share in enumerate(shares)}
    chosen, mass = set(), 0.0
    for pair in sorted(pairs, key=lambda pair: -pairs[pair]):
        if not query_aware or mass >= gamma * len(grid):
            break
        chosen.add(pair)
        mass += pairs[pair]

    def keep(i, j):
        return j == 0 or i == j or j in kept[0] or i - j in kept[1] or (i, j) in chosen

    return by_rule(q_len, kv_len, size, keep), query_aware


def flashprefill(q, k, size, alpha, sinks=2, window=4, last=2):
    """Return the blocks of FlashPrefill; q, k are lists of vectors."""
    kv_len, scale, result = len(k), len(q[0]) ** -0.5, []
    offset = kv_len - len(q)
    key_means = [mean_rows(k, j * size, (j + 1) * size) for j in range(math.ceil(kv_len / size))]
    grid = rows(len(q), kv_len, size)
    for i in grid:
        queries = q[max(0, i * size - offset) : (i + 1) * size - offset]
        sums = [sum(math.exp(dot(query, key) * scale) for query in queries) for key in key_means[: i + 1]]
        total = sum(sums)
        shares = [x / total for x in sums]
        near = {j for j in range(i + 1) if shares[j] >= alpha * max(shares)}
        near |= {j for j in range(i + 1) if j < sinks or i - j < window or i == j}
        result.append(set(range(i + 1)) if i >= grid[-1] + 1 - last else near)
    return result


def flashprefill_v2(q, k, size, alpha, sinks=2, window=4, last=8):
    """Return the blocks of FlashPrefill V2; q, k are lists of vectors."""
    scale, result, offset = len(q[0]) ** -0.5, [], len(k) - len(q)
    key_means = [mean_rows(k, j * size, (j + 1) * size) for j in range(math.ceil(len(k) / size))]
    grid = rows(len(q), len(k), size)
    for i in grid:
        energy = [0.0] * (i + 1)
        for query in q[max(0, i * size - offset) : (i + 1) * size - offset]:
            logits = [dot(query, key) * scale for key in key_means[: i + 1]]
            energy = [e + math.exp(x - max(logits)) for e, x in zip(energy, logits, strict=True)]
        near = {j for j in range(i + 1) if energy[j] >= alpha * max(energy)}
        near |= {j for j in range(i + 1) if j < sinks or i - j < window or i == j}
        result.append(set(range(i + 1)) if i >= grid[-1] + 1 - last else near)
    return result


def subblock_scores(q, k, size, cells):
    """Return {(i, j): ln of the sum over cell pairs of exp(mean q . mean k * scale)} of one head."""
    offset, step, scale = len(k) - len(q), size // cells, len(q[0]) ** -0.5
    scores = {}
    for i in rows(len(q), len(k), size):
        spans = [(max(i * size + a * step - offset, 0), i * size + (a + 1) * step - offset) for a in range(cells)]
        queries = [mean_rows(q, *span) for span in spans if q[span[0] : max(span[1], 0)]]
        for j in range(i + 1):
            spans = [(j * size + b * step, j * size + (b + 1) * step) for b in range(cells)]
            keys = [mean_rows(k, *span) for span in spans if k[slice(*span)]]
            scores[i, j] = math.log(sum(math.exp(dot(x, y) * scale) for x in queries for y in keys))
    return scores


def cosa(q, k, size, stride):
    """Return {(i, j): (if it holds the largest logit of some row of stride tokens, mass)} of one head."""
    offset, scale = len(k) - len(q), len(q[0]) ** -0.5
    result = {}

    def logit(a, b):  # of query cell a and key cell b, tokens that do not exist count as zeros
        total = 0.0
        for step in range(stride):
            query, key = a * stride + stride - 1 - step, b * stride + step
            if offset <= query < len(k) and key < len(k):
                total += dot(q[query - offset], k[key])
        return total * scale / stride

    for i in rows(len(q), len(k), size):
        held, mass = set(), [0.0] * (i + 1)
        for a in range(i * size // stride, (i + 1) * size // stride):
            if (a + 1) * stride <= offset or a * stride >= len(k):
                continue
            of_block = [-math.inf] * (i + 1)
            for b in range(a + 1):
                j = b * stride // size
                of_block[j] = max(of_block[j], logit(a, b))
            held.add(max(range(i + 1), key=of_block.__getitem__))
            mass = [m + math.exp(x - max(of_block)) for m, x in zip(mass, of_block, strict=True)]
        result |= {(i, j): (j in held, mass[j]) for j in range(i + 1)}
    return result


def blasst(q, k, size, threshold, keep=lambda i, j: True, first=lambda i, j: 0):
    """Return the blocks of the lists `keep` that a kernel with skipped softmax does not skip, and the diagonal.

    Blocks with the largest `first` are visited first.
    """
    offset, scale = len(k) - len(q), len(q[0]) ** -0.5

    def row(i):
        queries = range(max(i * size, offset), min((i + 1) * size, len(k)))
        running, kept = dict.fromkeys(queries, -math.inf), {i} if keep(i, i) else set()
        for j in sorted(filter(lambda j: keep(i, j), range(i + 1)), key=lambda j: -first(i, j)):
            skipped = True
            for t in queries:
                seen = range(j * size, min((j + 1) * size, t + 1))
                largest = max((dot(q[t - offset], k[s]) * scale for s in seen), default=-math.inf)
                running[t] = max(running[t], largest)
                skipped = skipped and math.exp(largest - running[t]) < threshold
            kept |= set() if skipped else {j}
        return kept

    return [row(i) for i in rows(len(q), len(k), size)]


def top_share(shares, i, forced, share, order=None):
    """Return one row: forced blocks, then others in descending order until `share` of the row's sum is kept."""
    kept = {j for j in forced if j <= i}
    total, mass = sum(shares[: i + 1]), sum(shares[j] for j in kept)
    for j in order or descending(shares[: i + 1]):
        if mass >= share * total:
            break
        if j not in kept:
            kept.add(j)
            mass += shares[j]
    return kept
