"""Elementary functions on float vectors, as LLVM IR: exp, log, sin, cos, tanh, erf, sigmoid. Called by `expressions.py`
and by the kernels that need an exponential (softmax, attention).

Every function is range reduction plus a polynomial. The coefficients are our own minimax fits (Lawson's iteratively
re-weighted least squares on Chebyshev nodes, each coefficient rounded to float and the rest refitted), the reductions
are those of Cody & Waite, "Software Manual for the Elementary Functions" (1980). Errors measured over dense sweeps of
float32 against float64 (tests/engine/targets/cpu/test_vector_math.py): at most 1.6 units in the last place,
2.7 for the lower tail of sigmoid.

float64 and the rare functions (tan, asin, sinh, …) go lane by lane through the C library.
"""

from __future__ import annotations

from engine.targets.cpu.codegen.emit import Builder, Value, lanes_of, scalar_of, vector_type

# exp(r) = 1 + r + r²·P(r) on |r| ≤ ln2/2, relative error 3e-9.
_EXP = (0.4999999403953552, 0.1666652113199234, 0.041668280959129333, 0.008368690498173237, 0.0013819490559399128)
# The same with a relative error of 1e-7.
_EXP_SHORT = (0.4999922811985016, 0.16667117178440094, 0.04189065471291542, 0.008312421850860119)
# log(1+f) = f − f²/2 + f³·P(f) on √½−1 ≤ f ≤ √2−1, relative error 6e-9.
_LOG = (0.3333333134651184, -0.25000837445259094, 0.20001284778118134, -0.16622774302959442, 0.14199833571910858,
        -0.13164231181144714, 0.1277833729982376, -0.07645110040903091)  # fmt: skip
# sin(r) = r + r³·P(r²), cos(r) = 1 − r²/2 + r⁴·P(r²) on |r| ≤ π/4, relative error 4e-9 and 1e-10.
_SIN = (-0.16666653752326965, 0.008332106284797192, -0.00019507877004798502)
_COS = (0.04166664555668831, -0.0013887308305129409, 2.4432092686765827e-05)
# tanh(x) = x + x³·P(x²) on |x| < 0.625, relative error 5e-9.
_TANH = (-0.33333277702331543, 0.13331322371959686, -0.05372936278581619, 0.020604275166988373, -0.005665035918354988)
# erf(x) = x + x·P(x²) on |x| < 0.9375 (relative error 2e-8); log(1 − erf(x)) = P(x) above (error of erf 2e-9).
_ERF_SMALL = (0.12837915122509003, -0.3761247992515564, 0.11281619966030121, -0.0267587099224329, 0.004980969708412886,
              -0.0005926818703301251)  # fmt: skip
_ERF_LARGE = (-0.0002560697596949442, -1.6269987008422344, -0.9190829394388127, -0.15009421465810108,
              0.03213908321010758, -0.004408330182578269, 0.00028447670853313595)  # fmt: skip
# 2ʳ on |r| ≤ ½, exact at 0, relative error 9.2e-8.
_EXP2 = (1.0, 0.6931469775965886, 0.24022242081843187, 0.05550733745645652, 0.009671512862187263,
         0.0013264727080165293)  # fmt: skip

_LN2 = 0.6931471805599453
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4
_LOG2_E = 1.44269504088896341
_TWO_OVER_PI = 0.6366197723675814
_SQRT_HALF_BITS = 0x3F3504F3
_ROUNDING = 12582912.0  # 1.5 · 2²³: adding it leaves the nearest integer in the low bits of the mantissa
_ROUNDING_BITS = 0x4B400000
_ROUNDING_F64 = 6755399441055744.0  # 1.5 · 2⁵²
_HALF_PI_HIGH, _HALF_PI_LOW = 1.5707963267948966, 6.123233995736766e-17
_REDUCTION_LIMIT = float(2**30)  # above, n·π/2 in two float64 parts is not exact enough


class VectorMath:
    """The functions for vectors of `lanes` floats (0: a scalar), written at the builder's current place."""

    def __init__(self, builder: Builder, lanes: int) -> None:
        self.b = builder
        self.f32 = vector_type("float", lanes)
        self.f64 = vector_type("double", lanes)
        self.i32 = vector_type("i32", lanes)
        self.i64 = vector_type("i64", lanes)
        self.i1 = vector_type("i1", lanes)

    def exp(self, x: Value) -> Value:
        """eˣ over the whole range: denormal results, 0 and ∞ at the ends, NaN for NaN."""
        capped = self.b.minimum(self._f32(89.0), self.b.maximum(self._f32(-104.0), x))
        result, n = self._exp_parts(capped)
        # 2ⁿ in two steps: neither half leaves the range of normal floats.
        half = self._int("ashr", n, 1)
        for part in (half, self.b.binary("sub", n, half)):
            result = self.b.binary("fmul", result, self._power_of_two(part))
        return result

    def exp_nonpositive(self, x: Value) -> Value:
        """eˣ for x ≤ 0 (what a softmax needs): exactly 0 below −87.7 and for −∞, where `exp` goes through denormals."""
        result, n = self._exp_parts(self.b.maximum(self._f32(-88.0), x))
        # The exponent field of n = −127 is 0, that is the number 0.
        return self.b.binary("fmul", result, self._power_of_two(n))

    def _exp_parts(self, x: Value) -> tuple[Value, Value]:
        """(exp(r), n as int32) with x = n·ln2 + r. The integer comes from the mantissa: no conversion breaks on NaN."""
        b = self.b
        shifted = b.fma(x, self._f32(_LOG2_E), self._f32(_ROUNDING))
        n = b.binary("fsub", shifted, self._f32(_ROUNDING))
        r = b.fma(n, self._f32(-_LN2_LOW), b.fma(n, self._f32(-_LN2_HIGH), x))
        tail = b.fma(self._polynomial(r, _EXP), b.binary("fmul", r, r), r)
        return b.binary("fadd", tail, self._f32(1.0)), self._int("sub", self._bits(shifted), _ROUNDING_BITS)

    def _power_of_two(self, n: Value) -> Value:
        return self._from_bits(self._int("shl", self._int("add", n, 127), 23))

    def log(self, x: Value) -> Value:
        """ln x: −∞ at 0, NaN below, denormals included."""
        b = self.b
        tiny = b.fcmp("olt", x, self._f32(2.0**-126))
        scaled = b.select(tiny, b.binary("fmul", x, self._f32(2.0**23)), x)
        shifted = self._int("sub", self._bits(scaled), _SQRT_HALF_BITS)  # mantissas from √½ to √2
        exponent = b.convert("sitofp", self._int("ashr", shifted, 23), self.f32)
        exponent = b.binary("fsub", exponent, b.select(tiny, self._f32(23.0), self._f32(0.0)))
        mantissa = self._int("add", self._int("and", shifted, 0x7FFFFF), _SQRT_HALF_BITS)
        f = b.binary("fsub", self._from_bits(mantissa), self._f32(1.0))
        tail = b.fma(self._polynomial(f, _LOG), f, self._f32(-0.5))
        low = b.fma(exponent, self._f32(_LN2_LOW), b.binary("fmul", b.binary("fmul", f, f), tail))
        result = b.fma(exponent, self._f32(_LN2_HIGH), b.binary("fadd", f, low))
        finite = b.fcmp("olt", x, self._f32(float("inf")))
        result = b.select(finite, result, x)  # ∞ and NaN
        result = b.select(b.fcmp("oeq", x, self._f32(0.0)), self._f32(float("-inf")), result)
        return b.select(b.fcmp("olt", x, self._f32(0.0)), self._f32(float("nan")), result)

    def tanh(self, x: Value) -> Value:
        b = self.b
        magnitude = self._absolute(x)
        squared = b.binary("fmul", x, x)
        small = b.fma(b.binary("fmul", self._polynomial(squared, _TANH), squared), x, x)
        # 1 − 2/(e²ˣ + 1); beyond 10 it is 1 in float32.
        capped = b.minimum(self._f32(10.0), magnitude)
        power = self.exp(b.binary("fadd", capped, capped))
        quotient = b.binary("fdiv", self._f32(2.0), b.binary("fadd", power, self._f32(1.0)))
        large = self._copysign(b.binary("fsub", self._f32(1.0), quotient), x)
        return b.select(b.fcmp("olt", magnitude, self._f32(0.625)), small, large)

    def sigmoid(self, x: Value) -> Value:
        """1/(1 + e⁻ˣ), from e^−|x| so that nothing overflows and the lower tail keeps its relative precision."""
        b = self.b
        power = self.exp(b.binary("fmul", self._absolute(x), self._f32(-1.0)))
        upper = b.binary("fdiv", self._f32(1.0), b.binary("fadd", power, self._f32(1.0)))
        return b.select(b.fcmp("olt", x, self._f32(0.0)), b.binary("fmul", power, upper), upper)

    def erf(self, x: Value) -> Value:
        b = self.b
        magnitude = self._absolute(x)
        small = b.fma(self._polynomial(b.binary("fmul", x, x), _ERF_SMALL), x, x)
        capped = b.minimum(self._f32(4.0), magnitude)  # erf is 1 in float32 from 3.92
        # log₂ of the complement; what is left of its error in 1 − complement is below ⅓ ulp.
        complement = self._exp2_moderate(self._polynomial(capped, _ERF_LARGE))
        large = self._copysign(b.binary("fsub", self._f32(1.0), complement), x)
        return b.select(b.fcmp("ult", magnitude, self._f32(0.9375)), small, large)

    def _exp2_moderate(self, x: Value) -> Value:
        """2ˣ for |x| < 100, to 9.2e-8; anything for NaN."""
        b = self.b
        shifted = b.binary("fadd", x, self._f32(_ROUNDING))
        r = b.binary("fsub", x, b.binary("fsub", shifted, self._f32(_ROUNDING)))
        # Only the integer part of `shifted` is left when the bits below the exponent move into its place.
        exponent = self._int("shl", self._bits(shifted), 23)
        return self._from_bits(b.binary("add", self._bits(self._polynomial(r, _EXP2)), exponent))

    def sin(self, x: Value) -> Value:
        return self._sine_or_cosine(x, "sin", 0)

    def cos(self, x: Value) -> Value:
        return self._sine_or_cosine(x, "cos", 1)

    def _sine_or_cosine(self, x: Value, name: str, quadrant: int) -> Value:
        """sin(x + quadrant·π/2): reduced in float64, where π/2 in two parts serves up to 2³⁰; larger arguments are
        rare and go through the C library, which reduces with all the bits of π that it takes."""
        b = self.b
        wide = b.convert("fpext", x, self.f64)
        shifted = self._fma_f64(wide, _TWO_OVER_PI, self._f64(_ROUNDING_F64))
        n = b.binary("fsub", self._f64(_ROUNDING_F64), shifted)  # −n
        reduced = self._fma_f64(n, _HALF_PI_LOW, self._fma_f64(n, _HALF_PI_HIGH, wide))
        turns = b.convert("trunc", b.convert("bitcast", shifted, self.i64), self.i32)
        if quadrant:
            turns = self._int("add", turns, quadrant)
        r = b.convert("fptrunc", reduced, self.f32)
        squared = b.binary("fmul", r, r)
        sine = b.fma(b.binary("fmul", self._polynomial(squared, _SIN), squared), r, r)
        cosine = b.binary("fmul", b.binary("fmul", squared, squared), self._polynomial(squared, _COS))
        cosine = b.binary("fadd", b.fma(squared, self._f32(-0.5), cosine), self._f32(1.0))
        odd = b.convert("trunc", turns, self.i1)
        sign = self._int("shl", self._int("and", turns, 2), 30)
        near = self._from_bits(b.binary("xor", self._bits(b.select(odd, cosine, sine)), sign))
        far = b.fcmp("ogt", self._absolute(x), self._f32(_REDUCTION_LIMIT))
        any_far = b.reduce("or", far) if lanes_of(far.type) else far
        return b.branch(any_far, lambda: [by_lane(b, name, x)], lambda: [near])[0]

    def _f32(self, value: float) -> Value:
        return self.b.const(value, self.f32)

    def _f64(self, value: float) -> Value:
        return self.b.const(value, self.f64)

    def _int(self, op: str, a: Value, literal: int) -> Value:
        return self.b.binary(op, a, self.b.const(literal, a.type))

    def _fma_f64(self, a: Value, literal: float, c: Value) -> Value:
        # A true fused multiply-add even where it is a library call: the reduction lives off its single rounding.
        return self.b.intrinsic("llvm.fma", self.f64, a, self._f64(literal), c)

    def _bits(self, x: Value) -> Value:
        return self.b.convert("bitcast", x, self.i32)

    def _from_bits(self, x: Value) -> Value:
        return self.b.convert("bitcast", x, self.f32)

    def _absolute(self, x: Value) -> Value:
        return self.b.intrinsic("llvm.fabs", self.f32, x)

    def _copysign(self, magnitude: Value, sign: Value) -> Value:
        return self.b.intrinsic("llvm.copysign", self.f32, magnitude, sign)

    def _polynomial(self, x: Value, coefficients: tuple[float, ...]) -> Value:
        """Σ coefficients[i]·xⁱ by Horner's rule."""
        result = self._f32(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = self.b.fma(result, x, self._f32(c))
        return result


def softmax_exp(b: Builder, x: Value) -> Value:
    """eˣ for x ≤ 0 in a dozen instructions, for the inner loop of attention: relative error 4e-7, 0 below −87.7."""
    f32 = x.type
    x = b.maximum(b.const(-88.0, f32), x)
    # The exponent's bias is part of the rounding constant: the low bits of the sum are the exponent field of 2ⁿ.
    shifted = b.fma(x, b.const(_LOG2_E, f32), b.const(_ROUNDING + 127, f32))
    n = b.binary("fsub", shifted, b.const(_ROUNDING + 127, f32))
    r = b.fma(n, b.const(-_LN2, f32), x)
    result = b.const(_EXP_SHORT[-1], f32)
    for c in (*reversed(_EXP_SHORT[:-1]), 1.0, 1.0):
        result = b.fma(result, r, b.const(c, f32))
    i32 = vector_type("i32", lanes_of(f32))
    scale = b.binary("shl", b.convert("bitcast", shifted, i32), b.const(23, i32))
    return b.binary("fmul", result, b.convert("bitcast", scale, f32))


def by_lane(b: Builder, name: str, *operands: Value) -> Value:
    """`name`, a double function of the C library, on floats or doubles, one lane after the other."""
    type_ = operands[0].type
    scalar, lanes = scalar_of(type_), lanes_of(type_)

    def one(values: list[Value]) -> Value:
        wide = [b.convert("fpext", value, "double") if scalar == "float" else value for value in values]
        result = b.call(name, "double", *wide)
        return b.convert("fptrunc", result, "float") if scalar == "float" else result

    if not lanes:
        return one(list(operands))
    result = Value("poison", type_)
    for lane in range(lanes):
        value = one([b.extract(operand, lane) for operand in operands])
        result = b.emit(f"insertelement {type_} {result.text}, {value.type} {value.text}, i64 {lane}", type_)
    return result
