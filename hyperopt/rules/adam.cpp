// Adam and AdamW with lr learned, in two passes over weights that stay where they are. The mathematics is `Adam.update`'s in adam.py and
// `Displacement`'s in hypergradients.py; what happens between the passes (every level above, trust) is theirs alone.
//
//     look    what a step must know before it is taken: Σg, Σg·Z, and if `far` Σx² and Σd², for the direction d at lr = 1
//     take    m, v, x −= lr·d, Z = kept·Z − lr·d
//
// The arguments of both are those of `Passes` in native.py. A block is a tensor, its first element there, and how many elements.


#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace {

enum { X, G, M, V, Z, T };                          // what there is of each tensor
enum { COMPLEMENT1, COMPLEMENT2, EPS, DECAY };      // 1 − beta1, 1 − beta2, eps, weight_decay

// a + w·(b − a) for w up to a half, b − (1 − w)·(b − a) from there on, as torch's lerp: at w = 1 it is b.
struct Average {
    bool late;
    float weight;

    explicit Average(float w) : late(w >= 0.5f), weight(late ? w - 1 : w) {}
    float operator()(float a, float b) const { return (late ? b : a) + weight * (b - a); }
};

struct Step {
    Average first, second;
    float eps, size, decay;

    // With both corrections of bias moved to the numbers, as in adam.py.
    Step(const float* const* values, float t)
        : first(*values[COMPLEMENT1]), second(*values[COMPLEMENT2]), decay(*values[DECAY]) {
        float root = std::sqrt(-std::expm1(t * std::log1p(-*values[COMPLEMENT2])));
        eps = *values[EPS] * root;
        size = root / -std::expm1(t * std::log1p(-*values[COMPLEMENT1]));
    }
};

struct Block {
    float *x, *m, *v, *z;
    const float *g;
    float t;
    int64_t n;

    Block(const int64_t* block, void* const* tensors, int64_t count) : n(block[2]) {
        auto at = [&](int what) { return static_cast<float*>(tensors[what * count + block[0]]) + block[1]; };
        x = at(X), g = at(G), m = at(M), v = at(V), z = at(Z);
        t = *static_cast<float*>(tensors[T * count + block[0]]);
    }
};

inline float square(float g) { return std::min(g * g, FLT_MAX); }

// An infinite weight stays so, decayed or not. Choices are between values that are there (here x or 0, in `take` z or 0), not between an
// operation and none, and not by decay, which is the same for all elements: of such a loop gcc 12 makes no vectors for AVX2, and the step
// takes three times as long.
inline float direction(const Step& s, float m, float v, float x) {
    return s.size * m / (std::sqrt(std::max(v, FLT_MIN)) + s.eps) + s.decay * (std::fabs(x) <= FLT_MAX ? x : 0);
}

}  // namespace

extern "C" void look(int64_t threads, int64_t far, int64_t blocks, const int64_t* block, int64_t count, void* const* tensors,
                     const float* const* values, double* partial, float* sums) {
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1)
    for (int64_t b = 0; b < blocks; b++) {
        Block at(block + 3 * b, tensors, count);
        Step s(values, at.t + 1);
        const float *x = at.x, *g = at.g, *m = at.m, *v = at.v, *z = at.z;
        float total = 0, inner = 0, weights = 0, moves = 0;
        if (far) {
#pragma omp simd reduction(+ : total, inner, weights, moves)
            for (int64_t i = 0; i < at.n; i++) {
                float d = direction(s, s.first(m[i], g[i]), s.second(v[i], square(g[i])), x[i]);
                total += g[i], inner += g[i] * z[i], weights += x[i] * x[i], moves += d * d;
            }
        } else {
#pragma omp simd reduction(+ : total, inner)
            for (int64_t i = 0; i < at.n; i++) total += g[i], inner += g[i] * z[i];
        }
        partial[4 * b] = total, partial[4 * b + 1] = inner, partial[4 * b + 2] = weights, partial[4 * b + 3] = moves;
    }
    // One block after the other, so that the sums do not depend on which thread was first.
    for (int k = 0; k < 4; k++) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; b++) sum += partial[4 * b + k];
        sums[k] = static_cast<float>(sum);
    }
}

extern "C" void take(int64_t threads, int64_t blocks, const int64_t* block, int64_t count, void* const* tensors,
                     const float* const* values, const float* orders) {
    const float ok = orders[0], lr = orders[1], kept = orders[2];
    if (!(ok > 0)) return;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1)
    for (int64_t b = 0; b < blocks; b++) {
        Block at(block + 3 * b, tensors, count);
        Step s(values, at.t);
        float *__restrict__ x = at.x, *__restrict__ m = at.m, *__restrict__ v = at.v, *__restrict__ z = at.z;
        const float* __restrict__ g = at.g;
#pragma omp simd
        for (int64_t i = 0; i < at.n; i++) {
            m[i] = s.first(m[i], g[i]);
            v[i] = s.second(v[i], square(g[i]));
            float move = -lr * direction(s, m[i], v[i], x[i]);
            z[i] = kept * (std::fabs(z[i]) <= FLT_MAX ? z[i] : 0) + move;
            x[i] += move;
        }
    }
}
