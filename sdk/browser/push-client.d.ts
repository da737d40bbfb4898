/** What a page wants of a connection. */
export interface PushClientOptions {
  /** The gateway's WebSocket: ws:, wss:, http: or https:, or a path of the page's own origin. Default: "ws". */
  url?: string | URL;
  /** Who the client is, where the gateway asks for no tokens. */
  userId?: string;
  /** A name for people. Default: userId. */
  userName?: string;
  /**
   * What pushes with a filter look at, such as device_id, platform and app_version: at most 16, keys and values of 1 to 64 bytes. What a
   * token says of them wins. They are read at each connection.
   */
  attributes?: Record<string, string>;
  /** Rooms to be in from the start, 100 at most. */
  rooms?: string[];
  /**
   * The token to show, or where to get one. A function is asked before each connection ("connect"), in time before a token ends
   * ("refresh"), and when one was refused ("refused"). A refused token that is given again ends the connection for good.
   */
  token?: string | ((why: "connect" | "refresh" | "refused") => string | Promise<string>);
  /** The last position that onPosition has told, to get what rooms have said since. */
  position?: string;

  /**
   * Gets each push, in order, and each message with an id once. It is confirmed when the function has returned, or its promise is
   * done; the next push waits for that. A push that fails (throws, rejects) is not confirmed: if the service has kept it, it comes again.
   */
  onPush: (push: Push) => void | Promise<void>;
  /** Tells each change of the connection. */
  onState?: (state: PushClientState) => void;
  /** Tells the rooms that we are in, whenever that changes. */
  onRooms?: (rooms: string[]) => void;
  /** Something that was said in a room is missing, and is not kept any more: load the room's state from the service. */
  onGap?: (room: string) => void;
  /** Tells the position, once a second at most. Keep it where it outlives what the client is to outlive. */
  onPosition?: (position: string) => void;
  /** Tells when the token in use ends. */
  onToken?: (expires: Date) => void;
  /** Tells what went wrong. The connection takes care of itself. */
  onError?: (error: PushClientError) => void;

  /** For tests. Default: those of the browser. */
  WebSocket?: new (url: string) => WebSocket;
  fetch?: typeof fetch;
}

/** A push. */
export interface Push {
  /** "text", "audio", "video", "translation", "system", or a number. */
  type: string;
  /** The room that was pushed to, "" for a push to users or to everybody. */
  room: string;
  /** Who the client is. */
  user: string;
  /** It went to everybody. */
  broadcast: boolean;
  time: Date;
  /** The data where it is text, else null. */
  text: string | null;
  /** The data where it is no text, else null. */
  bytes: Uint8Array | null;
  metadata: Record<string, string>;
  /** The message id, "" without one. */
  id: string;
  /** It comes out of the store or the log of a room, or comes again. */
  replayed: boolean;
}

/** How the connection is. */
export interface PushClientState {
  /** "waiting": it was lost, and is tried again in retryIn ms. "closed": it was never opened, close() was called, or trying again is of no use. */
  state: "connecting" | "open" | "waiting" | "closed";
  /** The close code, 0 for none; with "waiting" and "closed". */
  code?: number;
  /** The same in words. */
  reason?: string;
  retryIn?: number;
}

export interface PushClientError {
  /**
   * "gateway": it could not do what we asked; "handler": onPush failed; "token": there is none; "protocol": the gateway sent what is
   * no message.
   */
  kind: "gateway" | "handler" | "token" | "protocol";
  message: string;
  /** The room that it is about. */
  room?: string;
  /** What onPush has thrown. */
  error?: unknown;
}

/** A connection to a gateway that comes back when it is lost. */
export declare class PushClient {
  constructor(options: PushClientOptions);
  get state(): PushClientState["state"];
  /** The rooms that the gateway says we are in. */
  get rooms(): string[];
  /** Where we are in the logs of our rooms, "" if that is not known. */
  get position(): string;
  /** Connects, and stays connected until close() or an end that would come again. */
  connect(): void;
  /** Ends the connection. What has come and waits for onPush is left out, and comes again if the service has kept it. */
  close(): void;
  /** Is in a room from now on, also after a loss. A RangeError says that there are 100. */
  join(room: string): void;
  leave(room: string): void;
  /** Shows another token at once. Without this it is done in time before the old one ends. */
  refresh(): Promise<void>;
}

/** What a close code of the gateway means. */
export declare const closeReasons: Readonly<Record<number, string>>;

/** The claims of a JSON Web Token, {} of what is none. Nothing is verified. */
export declare function claimsOf(token: string): Record<string, any>;
