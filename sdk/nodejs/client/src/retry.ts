import { isUnclear, type PushError } from "./errors.js";

/** Bounds how often pushes are repeated. */
export interface Retries {
  /** Tries of one push, the first one included. Default 8; 1: nothing is repeated. */
  tries?: number;
  /** How many repeats a push pays for. Default 0.2: in the long run one repeat for five pushes. */
  ratio?: number;
  /** How many repeats may come on top of that. Default 1,000. */
  burst?: number;
}

/** A push that is about to be repeated. */
export interface Retry {
  /** Has a reason of Push-Manager's, or the push has a message id. */
  error: PushError;
  messageId: string;
  /** How long the push waits, in milliseconds. */
  delay: number;
}

/** Pauses before a push whose fate is unknown is repeated, and before a stream that broke is opened again: they double. */
const minBackoff = 50;
const maxBackoff = 5000;

export const backoff = (failures: number): number => Math.min(minBackoff * 2 ** Math.min(failures, 16), maxBackoff) * (0.5 + Math.random() / 2);

/** Waits. False: it was given up. */
export function pause(ms: number, signal: AbortSignal | undefined): Promise<boolean> {
  return new Promise((go) => {
    if (signal?.aborted === true) return go(false);
    const abort = (): void => {
      clearTimeout(timer);
      go(false);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", abort);
      go(true);
    }, ms);
    signal?.addEventListener("abort", abort, { once: true });
  });
}

/** What a Client has left for repeats: when everything is refused, repeats must not make up most of the work. */
export class Budget {
  readonly tries: number;
  private readonly ratio: number;
  private readonly burst: number;
  private left: number;

  constructor(r: Retries, private readonly hook: ((r: Retry) => void) | undefined) {
    this.tries = r.tries ?? 8;
    this.ratio = r.ratio ?? 0.2;
    this.burst = r.burst ?? 1000;
    if (!(this.tries >= 1) || !(this.ratio >= 0 && this.ratio <= 1) || !(this.burst >= 0)) {
      throw new RangeError("retries: tries must be 1 or more, ratio 0 to 1, burst 0 or more");
    }
    this.left = this.burst;
  }

  /** Is called for each push. */
  earn(): void {
    this.left = Math.min(this.left + this.ratio, this.burst);
  }

  /** Takes one repeat, if there is one left. */
  trySpend(): boolean {
    if (this.left < 1) return false;
    this.left--;
    return true;
  }

  tell(r: Retry): void {
    try {
      this.hook?.(r);
    } catch {
      // A hook is for metrics and logs, and decides nothing.
    }
  }
}

/** Those of one push. */
export class Tries {
  n = 0;
  /** One of them may have been delivered. */
  maybe = false;
  /** About all of them. */
  last: PushError | undefined;

  constructor(private readonly budget: Budget, private readonly messageId: string) {
    budget.earn();
  }

  /** Takes a failed try into the account. */
  note(e: PushError): void {
    this.n++;
    this.maybe ||= !e.notSent;
    this.last = e.about(this.n, this.maybe);
  }

  /**
   * Notes how a try ended, and tells after how many milliseconds there is another one; undefined: there is none. left is the time that the
   * push has. may: false if it may not be repeated for another reason. paid: what the repeat costs was paid for.
   */
  next(e: PushError, left: number, may = true, paid = false): number | undefined {
    const refused = e.notSent;
    this.note(e);
    if (!may || this.n >= this.budget.tries) return undefined;
    let delay: number;
    if (refused && e.reason !== "" && e.retryAfter !== undefined) delay = e.retryAfter;
    else if (!refused && this.messageId !== "" && isUnclear(e.code)) delay = backoff(this.n - 1);
    else return undefined;
    if (delay >= left || (!paid && !this.budget.trySpend())) return undefined;
    this.budget.tell({ error: this.last!, messageId: this.messageId, delay });
    return delay;
  }
}
