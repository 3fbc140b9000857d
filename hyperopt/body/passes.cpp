// The two passes over the weights of a training step on a CPU, for every rule whose learned hyperparameter (lr, or none) does not enter its
// direction. What happens between the passes, every level above and trust, is a matter of a few numbers and left to the caller.
//
//     look    what must be known before the step: Σg, Σg·(tangent), and on request Σplace² and Σs², for the step s at lr = 1
//     take    state, place −= lr·s, what follows from place (averages, x), the tangents of all of it, and Σplace²
//
// The direction is either given in D, by any rule, or Adam's, which is computed here, once in each pass: reading it back would cost as much
// as reading m, v and g again does. Both corrections of Adam's bias are moved to the scalars.
//
// Each block is handled in pieces that stay in the first-level cache: one loop puts s for a piece into a small buffer, a second makes
// everything else of it. So a loop exists for each direction plus for each rule, not times; and none goes through more than six arrays.
//
// gcc 12 vectorises none of these loops for AVX2 if there is a branch in it, even one on a loop-invariant. Hence all cases are templates,
// chosen once for each block, and inside a loop there are only choices between values that exist on both sides (z or 0).

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Columns of `tensors` and indices of `values`; functions.py has the same names in the same order.
enum Column { X, G, D, M, V, PLACE, AVERAGE, ZX, ZA, T, WEIGHT, ZWEIGHT, MIX };
enum Value { REST1, REST2, EPS, WEIGHT_DECAY, BETA, REST_DECAY };

constexpr float ROOT_MIN = 0x1p-63f;  // √FLT_MIN
constexpr int64_t PIECE = 1024;  // elements; 4 KiB of each array

// What the caller hands to both passes.
struct Table {
    const int64_t* block;
    int64_t count;
    void* const* tensors;
    const float* const* values;

    float* column(Column c, int64_t tensor) const { return static_cast<float*>(tensors[c * count + tensor]); }
    float number(Column c, int64_t tensor) const {
        const float* p = column(c, tensor);
        return p ? *p : 0;
    }
    float value(Value v) const { return values[v] ? *values[v] : 0; }
};

// One row of `block`: a stretch of one tensor.
struct Stretch {
    const Table& table;
    int64_t tensor, start, n;

    Stretch(const Table& all, int64_t b) : table(all), tensor(all.block[3 * b]), start(all.block[3 * b + 1]), n(all.block[3 * b + 2]) {}
    float* at(Column c, int64_t from) const {
        float* p = table.column(c, tensor);
        return p ? p + start + from : nullptr;
    }
    bool has(Column c) const { return table.column(c, tensor) != nullptr; }
    float number(Column c) const { return table.number(c, tensor); }
    Column place() const { return has(PLACE) ? PLACE : X; }
};

// a + w·(b − a) for w below a half, b − (1 − w)·(b − a) from there on, as torch.lerp: at w = 1 it is b exactly.
struct Lerp {
    int32_t late;  // all bits or none: on a bool gcc makes two loops, of which it vectorises one or neither
    float weight;

    explicit Lerp(float w) : late(w >= 0.5f ? -1 : 0), weight(w >= 0.5f ? w - 1 : w) {}
    float operator()(float a, float b) const {
        int32_t from, to;
        std::memcpy(&from, &a, 4), std::memcpy(&to, &b, 4);
        from ^= (from ^ to) & late;
        float base;
        std::memcpy(&base, &from, 4);
        return base + weight * (b - a);
    }
};

inline float finite_or_zero(float z) { return std::fabs(z) <= FLT_MAX ? z : 0; }

// 1 − beta^t for 1 − beta, without cancellation.
inline float rest_of_power(float rest, float t) { return -std::expm1(t * std::log1p(-rest)); }

// Adam's scalars at a step; `t` counts from 1.
struct Adam {
    Lerp first, second;
    float eps, size, t;

    Adam(const Table& table, bool momentum, float step)
        : first(table.value(REST1)), second(table.value(REST2)), t(step) {
        size = std::sqrt(rest_of_power(table.value(REST2), t));
        eps = table.value(EPS) * size;
        if (momentum) size /= rest_of_power(table.value(REST1), t);
    }
    float moment1(float m, float g) const { return first(m, g); }
    float moment2(float v, float g) const { return second(v, std::min(g * g, FLT_MAX)); }
    float direction(float m, float v) const { return size * m / (std::max(std::sqrt(v), ROOT_MIN) + eps); }
};

// The scalars of the stretch before this one, as long as they are those of the same step: tensors of a few elements are many.
struct Scalars {
    Adam adam;
    bool momentum = false;

    explicit Scalars(const Table& table) : adam(table, false, NAN) {}
    const Adam& of(const Stretch& at) {
        float t = at.number(T) + 1;
        if (t != adam.t || momentum != at.has(M)) adam = Adam(at.table, momentum = at.has(M), t);
        return adam;
    }
};

enum Direction { GIVEN, GRADIENT, MOMENTUM };  // read from D; Adam's without and with a first moment

inline Direction direction_of(const Stretch& at) { return at.has(D) ? GIVEN : at.has(M) ? MOMENTUM : GRADIENT; }

// Calls f with a constant for each of these, so that loops can be made for it.
template <class F> void each_bool(bool b, F f) { b ? f(std::true_type{}) : f(std::false_type{}); }
template <class F> void each_direction(Direction d, F f) {
    if (d == GIVEN) f(std::integral_constant<Direction, GIVEN>{});
    else if (d == GRADIENT) f(std::integral_constant<Direction, GRADIENT>{});
    else f(std::integral_constant<Direction, MOMENTUM>{});
}

// Calls work(b) for all blocks. Each thread has neighbouring blocks with the same number of elements as the others', not the same number of
// blocks: of the 16 of an MLP for MNIST four are small. `take` goes through them backwards, as `look` left the last ones in the cache.
template <class Work> void for_blocks(int64_t threads, int64_t blocks, const int64_t* block, const Work& work) {
    int64_t all = 0;
    for (int64_t b = 0; b < blocks; b++) all += block[3 * b + 2];
    auto share = [&](int64_t team, int64_t me) {
        int64_t begin = blocks, end = blocks, before = 0;
        for (int64_t b = 0; b < blocks; b++) {
            // By its middle, a block belongs to one thread whatever the sizes are.
            int64_t owner = all ? std::min((before + block[3 * b + 2] / 2) * team / all, team - 1) : 0;
            before += block[3 * b + 2];
            if (owner < me) continue;
            if (owner > me) { end = b; break; }
            begin = std::min(begin, b);
        }
        work(begin, std::max(begin, end));
    };
#ifdef _OPENMP
    if (threads > 1 && blocks > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        share(omp_get_num_threads(), omp_get_thread_num());
        return;
    }
#endif
    share(1, 0);
}

// Block after block, so that the sums do not depend on the number of threads.
float total(int64_t blocks, const double* partial, int k) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; b++) sum += partial[4 * b + k];
    return static_cast<float>(sum);
}

float squares(const float* place, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += place[i] * place[i];
    return sum;
}

// Σg, Σg·z and Σs² of a piece, added to `sums`.
template <Direction KIND, bool DECAYED, bool TANGENT>
void gradient_and_step(const Adam& adam, float decay, int64_t n, const float* g, const float* z, const float* d, const float* m,
                       const float* v, const float* x, double* sums) {
    float gradient = 0, inner = 0, moves = 0;
#pragma omp simd reduction(+ : gradient, inner, moves)
    for (int64_t i = 0; i < n; i++) {
        float s;
        if constexpr (KIND == GIVEN) s = d[i];
        if constexpr (KIND == GRADIENT) s = adam.direction(g[i], adam.moment2(v[i], g[i]));
        if constexpr (KIND == MOMENTUM) s = adam.direction(adam.moment1(m[i], g[i]), adam.moment2(v[i], g[i]));
        if constexpr (DECAYED) s += decay * finite_or_zero(x[i]);
        if constexpr (TANGENT) inner += g[i] * z[i];
        gradient += g[i], moves += s * s;
    }
    sums[0] += gradient, sums[1] += inner, sums[3] += moves;
}

template <bool TANGENT> void gradient_alone(int64_t n, const float* g, const float* z, double* sums) {
    float gradient = 0, inner = 0;
#pragma omp simd reduction(+ : gradient, inner)
    for (int64_t i = 0; i < n; i++) {
        gradient += g[i];
        if constexpr (TANGENT) inner += g[i] * z[i];
    }
    sums[0] += gradient, sums[1] += inner;
}

// The step at lr = 1 of a piece into `s`, and Adam's moments, which are written.
template <Direction KIND, bool DECAYED>
void step(const Adam& adam, float decay, int64_t n, const float* __restrict__ g, const float* __restrict__ d, float* __restrict__ m,
          float* __restrict__ v, const float* __restrict__ x, float* __restrict__ s) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float made;
        if constexpr (KIND == GIVEN) made = d[i];
        else {
            float m1 = g[i], v1 = v[i] = adam.moment2(v[i], g[i]);
            if constexpr (KIND == MOMENTUM) m1 = m[i] = adam.moment1(m[i], g[i]);
            made = adam.direction(m1, v1);
        }
        if constexpr (DECAYED) made += decay * finite_or_zero(x[i]);
        s[i] = made;
    }
}

// What `take` does with a piece of s; each returns Σplace'². `keep` is what tangents of past steps still count.

template <bool LEARNED>
float plain(float lr, float keep, int64_t n, const float* __restrict__ s, float* __restrict__ x, float* __restrict__ zx) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        float move = lr * s[i], x1 = x[i] - move;
        if constexpr (LEARNED) zx[i] = keep * finite_or_zero(zx[i]) - move;
        x[i] = x1, sum += x1 * x1;
    }
    return sum;
}

template <bool LEARNED, bool TANGENT>
float averaged(float lr, float shrunk, float keep, float share, int64_t n, const float* __restrict__ s, float* __restrict__ x,
               float* __restrict__ a, float* __restrict__ zx, float* __restrict__ za) {
    Lerp mean(share);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        float move = lr * s[i], x1 = x[i] - move;
        if constexpr (LEARNED) {
            float z1 = shrunk * finite_or_zero(zx[i]) - move;
            if constexpr (TANGENT) za[i] = mean(keep * finite_or_zero(za[i]), z1);
            zx[i] = z1;
        }
        a[i] = mean(a[i], x1), x[i] = x1, sum += x1 * x1;
    }
    return sum;
}

// ScheduleFree's numbers at a step.
struct Mix {
    float weight, zweight;   // W' and its tangent
    float share, zshare;     // c = lr² / W' and its tangent
    float unmix;             // 1 / the mix by which x was made, 0 where x is z
    float from_x, from_a;    // what the tangents of z and of the average count in that of z'

    Mix(const Table& table, int64_t tensor, float lr, float keep) {
        float square = lr * lr, mix = table.number(MIX, tensor), decay = lr * table.value(WEIGHT_DECAY);
        weight = table.number(WEIGHT, tensor) + square;
        zweight = keep * finite_or_zero(table.number(ZWEIGHT, tensor)) + 2 * square;
        share = square / std::max(weight, FLT_MIN);
        zshare = share * (2 - (weight >= FLT_MIN ? zweight / weight : 0));
        unmix = mix != 0 ? 1 / mix : 0;
        // Weight decay is taken at x, whose tangent is mixed as x is.
        from_x = keep * (1 - decay * (1 - mix)), from_a = -keep * decay * mix;
    }
};

template <bool LEARNED, bool STORED>
float schedule_free(float lr, float keep, float beta, const Mix& by, int64_t n, const float* __restrict__ s, float* __restrict__ x,
                    float* __restrict__ z, float* __restrict__ a, float* __restrict__ zz, float* __restrict__ za) {
    Lerp mean(by.share), mixed(beta);
    float kept = keep * (1 - by.share), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        float move = lr * s[i], z1 = z[i] - move, old;
        if constexpr (STORED) old = a[i];
        else old = z[i] + (x[i] - z[i]) * by.unmix;
        float a1 = mean(old, z1);
        if constexpr (LEARNED) {
            float tz = finite_or_zero(zz[i]), ta = finite_or_zero(za[i]), tz1 = by.from_x * tz + by.from_a * ta - move;
            za[i] = kept * ta + by.share * tz1 + by.zshare * (z1 - old);
            zz[i] = tz1;
        }
        if constexpr (STORED) a[i] = a1;
        z[i] = z1, x[i] = mixed(z1, a1), sum += z1 * z1;
    }
    return sum;
}

float advance(const Stretch& at, int64_t i, int64_t n, float lr, float keep, const float* s, const Mix& by, float share) {
    const Table& table = at.table;
    float *x = at.at(X, i), *place = at.at(PLACE, i), *a = at.at(AVERAGE, i), *zx = at.at(ZX, i), *za = at.at(ZA, i), sum = 0;
    float shrunk = keep * (1 - lr * table.value(WEIGHT_DECAY)), beta = table.value(BETA);
    if (place) each_bool(zx && za, [&](auto learned) {
        each_bool(a != nullptr, [&](auto stored) { sum = schedule_free<learned, stored>(lr, keep, beta, by, n, s, x, place, a, zx, za); });
    });
    else if (a && zx) each_bool(za != nullptr, [&](auto t) { sum = averaged<true, t>(lr, shrunk, keep, share, n, s, x, a, zx, za); });
    else if (a) sum = averaged<false, false>(lr, shrunk, keep, share, n, s, x, a, zx, za);
    else each_bool(zx != nullptr, [&](auto learned) { sum = plain<learned>(lr, shrunk, n, s, x, zx); });
    return sum;
}

}  // namespace

// Whether this CPU has the instructions that the file was compiled for. An object built with -march=native may reach another machine inside
// a copied environment; the check itself uses none of them.
#if defined(__x86_64__) && defined(__GNUC__)
#define PLAIN __attribute__((target("no-avx,no-bmi,no-bmi2")))
#else
#define PLAIN
#endif
extern "C" PLAIN int usable() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#define NEEDS(name) \
    if (!__builtin_cpu_supports(name)) return 0;
#ifdef __SSE4_2__
    NEEDS("sse4.2")
#endif
#ifdef __POPCNT__
    NEEDS("popcnt")
#endif
#ifdef __AVX__
    NEEDS("avx")
#endif
#ifdef __AVX2__
    NEEDS("avx2")
#endif
#ifdef __FMA__
    NEEDS("fma")
#endif
#ifdef __FMA4__
    NEEDS("fma4")
#endif
#ifdef __BMI__
    NEEDS("bmi")
#endif
#ifdef __BMI2__
    NEEDS("bmi2")
#endif
#ifdef __AVX512F__
    NEEDS("avx512f")
#endif
#ifdef __AVX512VL__
    NEEDS("avx512vl")
#endif
#ifdef __AVX512BW__
    NEEDS("avx512bw")
#endif
#ifdef __AVX512DQ__
    NEEDS("avx512dq")
#endif
#ifdef __AVX512CD__
    NEEDS("avx512cd")
#endif
#ifdef __AVX512ER__
    NEEDS("avx512er")
#endif
#undef NEEDS
#endif
    return 1;
}

extern "C" void look(int64_t threads, int64_t measure, int64_t blocks, const int64_t* block, int64_t count, void* const* tensors,
                     const float* const* values, double* partial, float* sums) {
    const Table table{block, count, tensors, values};
    const float decay = table.value(WEIGHT_DECAY);
    for_blocks(threads, blocks, block, [&](int64_t begin, int64_t end) {
        Scalars scalars(table);
        for (int64_t b = begin; b < end; b++) {
            const Stretch at(table, b);
            const Adam& adam = scalars.of(at);
            const Column tangent = at.has(PLACE) ? ZA : ZX;
            double found[4] = {};
            for (int64_t i = 0; i < at.n; i += PIECE) {
                const int64_t n = std::min(PIECE, at.n - i);
                const float *g = at.at(G, i), *z = at.at(tangent, i);
                each_bool(z != nullptr, [&](auto learned) {
                    if (!measure) return gradient_alone<learned>(n, g, z, found);
                    each_bool(decay != 0, [&](auto decayed) {
                        each_direction(direction_of(at), [&](auto kind) {
                            gradient_and_step<kind, decayed, learned>(adam, decay, n, g, z, at.at(D, i), at.at(M, i), at.at(V, i),
                                                                      at.at(X, i), found);
                        });
                    });
                });
                if (measure == 1) found[2] += squares(at.at(at.place(), i), n);
            }
            std::copy(found, found + 4, partial + 4 * b);
        }
    });
    for (int k = 0; k < 4; k++) sums[k] = total(blocks, partial, k);
}

extern "C" void take(int64_t threads, int64_t blocks, const int64_t* block, int64_t count, void* const* tensors,
                     const float* const* values, int64_t heads, const int64_t* head, const float* orders, double* partial, float* sums) {
    const float ok = orders[0], lr = orders[1], keep = orders[2];
    if (!(ok > 0)) return;
    const Table table{block, count, tensors, values};
    const float decay = table.value(WEIGHT_DECAY), rest = table.value(REST_DECAY);
    for_blocks(threads, blocks, block, [&](int64_t begin, int64_t end) {
        Scalars scalars(table);
        alignas(64) float buffer[PIECE];
        for (int64_t b = end - 1; b >= begin; b--) {
            const Stretch at(table, b);
            const Adam& adam = scalars.of(at);
            const Mix by(table, at.tensor, lr, keep);
            const float share = rest / rest_of_power(rest, at.number(T) + 1);
            const Direction kind = direction_of(at);
            double sum = 0;
            for (int64_t i = 0; i < at.n; i += PIECE) {
                const int64_t n = std::min(PIECE, at.n - i);
                const float* s = buffer;
                if (kind == GIVEN && decay == 0) s = at.at(D, i);
                else each_bool(decay != 0, [&](auto decayed) {
                    each_direction(kind, [&](auto made) {
                        step<made, decayed>(adam, decay, n, at.at(G, i), at.at(D, i), at.at(M, i), at.at(V, i), at.at(X, i), buffer);
                    });
                });
                sum += advance(at, i, n, lr, keep, s, by, share);
            }
            partial[4 * b + 2] = sum;
        }
    });
    // Only now, as every block of a chunk has read them.
    for (int64_t h = 0; h < heads; h++) {
        const int64_t tensor = head[h];
        *table.column(T, tensor) += 1;
        if (!table.column(PLACE, tensor)) continue;
        const Mix by(table, tensor, lr, keep);
        *table.column(WEIGHT, tensor) = by.weight;
        if (table.column(ZWEIGHT, tensor)) *table.column(ZWEIGHT, tensor) = by.zweight;
        *table.column(MIX, tensor) = table.value(BETA);
    }
    sums[2] = total(blocks, partial, 2);
}
