//! Tile instructions in software, for tests on processors without them.
//!
//! Such a processor refuses them with a signal; its handler does what the
//! Software Developer's Manual says the instruction does to a state of this
//! thread's own, and goes on behind it. Shapes and operands are checked as the
//! processor checks them. Not in the program: it costs microseconds a tile, and
//! takes the signal from whoever else wants it.

use std::cell::UnsafeCell;
use std::sync::OnceLock;

/// Tile registers: shapes as configured, bytes of sixteen rows of 64.
struct Tiles {
    on: bool,
    rows: [usize; 8],
    width: [usize; 8],
    data: [[u8; 1024]; 8],
}

thread_local! {
    static TILES: UnsafeCell<Tiles> =
        const { UnsafeCell::new(Tiles { on: false, rows: [0; 8], width: [0; 8], data: [[0; 1024]; 8] }) };
}

/// Makes this process understand tile instructions, if it has what else the
/// tier needs. The processor's own are preferred.
pub(crate) fn install() -> bool {
    use std::arch::is_x86_feature_detected as has;
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| {
        let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
        if !(wide && has!("avx512vnni") && has!("avx512bf16")) {
            eprintln!("skipped: the AMX tier in software: this processor has no AVX-512 VNNI and BF16");
            return false;
        }
        // SAFETY: a handler of three arguments, as SA_SIGINFO says.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_signal;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
        }
    })
}

/// Ends the process: a test went wrong where no panic may begin.
fn fail(why: &str) -> ! {
    let text = ["emulated tiles: ", why, "\n"];
    for t in text {
        // SAFETY: writes bytes that are there.
        unsafe { libc::write(2, t.as_ptr().cast(), t.len()) };
    }
    // SAFETY: ends the process.
    unsafe { libc::abort() }
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands over the interrupted thread's registers. What its
    // instructions read and write is what the processor would have.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const u8;
        let length = TILES.with(|tiles| execute(&mut *tiles.get(), at, registers));
        registers[libc::REG_RIP as usize] += length as i64;
    }
}

/// Does the instruction at `at`; its length.
unsafe fn execute(tiles: &mut Tiles, at: *const u8, registers: &[i64; 23]) -> usize {
    // SAFETY: an instruction's bytes are readable up to its end.
    let byte = |i: usize| unsafe { usize::from(*at.add(i)) };
    // Three bytes of prefix, map 0F38, 128 bits wide.
    if byte(0) != 0xc4 || byte(1) & 31 != 2 || byte(2) & 0x84 != 0 {
        fail("an instruction that is no tile instruction");
    }
    let (prefix, operation, modrm) = (byte(2) & 3, byte(3), byte(4));
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
    let vvvv = !(byte(2) >> 3) & 15;
    match (operation, prefix, mode) {
        (0x49, 0, 3) => {
            tiles.on = false;
            return 5;
        }
        (0x49, 0, _) => {
            // SAFETY: the instruction that was trapped, and its registers.
            let (address, length) = unsafe { address(at, registers) };
            // SAFETY: the program has its 64 bytes there, or the processor would trap.
            unsafe { tiles.configure(address) };
            return length;
        }
        _ => {}
    }
    if !tiles.on {
        fail("tiles are not configured");
    }
    match (operation, prefix, mode) {
        (0x49, 3, 3) => tiles.data[reg] = [0; 1024],
        (0x4b, 2 | 3, 0..3) => {
            // SAFETY: the instruction that was trapped, and its registers.
            let (start, length) = unsafe { address(at, registers) };
            // SAFETY: as above.
            let stride = unsafe { index(at, registers) };
            for row in 0..tiles.rows[reg] {
                let tile = tiles.data[reg][row * 64..].as_mut_ptr();
                let memory = start.wrapping_add(row * stride);
                let (from, to) = if prefix == 3 { (memory.cast_const(), tile) } else { (tile.cast_const(), memory) };
                // SAFETY: the program has the tile's rows there, as for the processor.
                unsafe { std::ptr::copy(from, to, tiles.width[reg]) };
            }
            if prefix == 3 {
                tiles.data[reg][tiles.rows[reg] * 64..].fill(0);
            }
            return length;
        }
        (0x5e, 3, 3) => tiles.dot(reg, rm, vvvv, bytes),
        (0x5c, 2, 3) => tiles.dot(reg, rm, vvvv, floats),
        _ => fail("a tile instruction that our kernels do not use"),
    }
    5
}

/// The memory operand: base and displacement, and the instruction's length.
unsafe fn address(at: *const u8, registers: &[i64; 23]) -> (*mut u8, usize) {
    // SAFETY: as in `execute`.
    let byte = |i: usize| unsafe { *at.add(i) };
    let (modrm, b) = (byte(4), usize::from(!byte(1) >> 5 & 1) * 8);
    let (mode, rm) = (modrm >> 6, usize::from(modrm & 7));
    let (base, after) = if rm == 4 { (usize::from(byte(5) & 7) + b, 6) } else { (rm + b, 5) };
    if mode == 0 && base & 7 == 5 {
        fail("an address without a base");
    }
    let (shift, length) = match mode {
        0 => (0, after),
        1 => (isize::from(byte(after) as i8), after + 1),
        _ => (i32::from_le_bytes(std::array::from_fn(|i| byte(after + i))) as isize, after + 4),
    };
    ((register(registers, base) as *mut u8).wrapping_offset(shift), length)
}

/// The scaled index of the memory operand: the stride of a tile's rows.
unsafe fn index(at: *const u8, registers: &[i64; 23]) -> usize {
    // SAFETY: as in `execute`.
    let (prefix, modrm, sib) = unsafe { (*at.add(1), *at.add(4), usize::from(*at.add(5))) };
    let number = (sib >> 3 & 7) + usize::from(!prefix >> 6 & 1) * 8;
    if modrm & 7 != 4 || number == 4 {
        fail("a tile without a stride");
    }
    (register(registers, number) as usize) << (sib >> 6)
}

fn register(registers: &[i64; 23], number: usize) -> i64 {
    use libc::*;
    let order = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
        REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    registers[order[number] as usize]
}

impl Tiles {
    unsafe fn configure(&mut self, at: *const u8) {
        // SAFETY: 64 bytes, as the instruction reads.
        let byte = |i: usize| usize::from(unsafe { *at.add(i) });
        if byte(0) != 1 || (1..16).any(|i| byte(i) != 0) || (32..48).chain(56..64).any(|i| byte(i) != 0) {
            fail("a configuration with bytes set that must be 0");
        }
        self.on = true;
        self.data = [[0; 1024]; 8];
        for t in 0..8 {
            self.width[t] = byte(16 + 2 * t) | byte(17 + 2 * t) << 8;
            self.rows[t] = byte(48 + t);
            if self.rows[t] > 16 || self.width[t] > 64 || (self.rows[t] == 0) != (self.width[t] == 0) {
                fail("a shape beyond sixteen rows of 64 bytes");
            }
        }
    }

    /// `c[m][n] = step(c[m][n], pairs of a[m] and b's columns)`.
    fn dot(&mut self, c: usize, a: usize, b: usize, step: fn([u8; 4], &mut dyn Iterator<Item = [[u8; 4]; 2]>) -> [u8; 4]) {
        let fits = self.rows[c] == self.rows[a] && self.width[c] == self.width[b] && self.width[a] == 4 * self.rows[b];
        if !fits || c == a || c == b || a == b || self.width[a] % 4 != 0 {
            fail("shapes of a product that do not fit");
        }
        let four = |tile: &[u8; 1024], row: usize, i: usize| std::array::from_fn(|j| tile[row * 64 + 4 * i + j]);
        for m in 0..self.rows[c] {
            for n in 0..self.width[c] / 4 {
                let (x, w) = (&self.data[a], &self.data[b]);
                let mut pairs = (0..self.rows[b]).map(|k| [four(x, m, k), four(w, k, n)]);
                let sum = step(four(&self.data[c], m, n), &mut pairs);
                self.data[c][m * 64 + 4 * n..][..4].copy_from_slice(&sum);
            }
        }
    }
}

/// TDPBSSD: signed bytes times signed bytes.
fn bytes(c: [u8; 4], pairs: &mut dyn Iterator<Item = [[u8; 4]; 2]>) -> [u8; 4] {
    let four = |[x, w]: [[u8; 4]; 2]| (0..4).map(|i| i32::from(x[i] as i8) * i32::from(w[i] as i8)).sum::<i32>();
    pairs.map(four).fold(i32::from_le_bytes(c), i32::wrapping_add).to_le_bytes()
}

/// TDPBF16PS: even and odd k in chains of their own, denormal numbers taken as 0.
fn floats(c: [u8; 4], pairs: &mut dyn Iterator<Item = [[u8; 4]; 2]>) -> [u8; 4] {
    let flush = |v: f32| if v.is_subnormal() { 0f32.copysign(v) } else { v };
    let wide = |v: [u8; 4], i: usize| flush(f32::from_bits(u32::from(v[2 * i]) << 16 | u32::from(v[2 * i + 1]) << 24));
    let mut chains = [0f32; 2];
    for [x, w] in pairs {
        for (i, chain) in chains.iter_mut().enumerate() {
            *chain = flush(wide(x, i).mul_add(wide(w, i), *chain));
        }
    }
    flush(flush(f32::from_le_bytes(c)) + flush(chains[0] + chains[1])).to_le_bytes()
}
